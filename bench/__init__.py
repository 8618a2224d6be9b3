"""Head-to-heads against named peers: ``python -m bench``.

Everything runs on one thread, which has to be said before numpy or torch is imported: here.
"""

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
