"""Clips over HTTP: ``archipel serve RUN``, the OpenAI video interface on a run's models.

Requests are checked in ``asked``, kept as jobs in ``jobs`` (SQLite), worked off by one thread in ``worker``, and offered
by ``app``. Whatever a client sends is hostile until checked: ``gate`` (keys, origins, sizes), ``uploads`` (pictures).
The packages of the extra ``serve`` are imported inside functions only.
"""
