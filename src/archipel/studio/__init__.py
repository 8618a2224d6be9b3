"""The studio: ``archipel studio RUN``, a page in the browser on the server that ``archipel serve`` runs.

``mount`` puts gradio's application behind the server's gate, ``page`` lays it out; one module per tab. Jobs are the HTTP
interface's own, so that what is asked for here is found there and survives a reload or a restart. gradio is imported inside
functions only (extra ``studio``).
"""
