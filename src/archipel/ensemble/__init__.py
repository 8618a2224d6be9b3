"""Many experts as one velocity: guidance, strategies, the pipeline that generates, and writing clips as files.

Nothing is imported here: ``video`` and ``strategies`` are of use without the pipeline and its networks.
"""
