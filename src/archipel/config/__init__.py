"""``run.toml``: the science of a run, typed. Written once at ``init``; its sha256 is the run's id.

``schema`` has the keys, ``checks`` what cannot work together, ``files`` reading, writing and ``--set``.
"""

from archipel.config.checks import check, check_count, rope_axes_for
from archipel.config.files import build, known_keys, lookup, merge, parse, parse_sets, read, to_toml
from archipel.config.schema import (
    FEATURE_NETWORK,
    STRATEGIES,
    Backbone,
    Clips,
    Codec,
    CodecName,
    Compute,
    Evaluate,
    Expert,
    FeatureName,
    Monolith,
    Partition,
    Router,
    RunConfig,
    RunSection,
    Sample,
    Section,
    SourceName,
    Strategy,
    Text,
)

__all__ = [
    "FEATURE_NETWORK",
    "STRATEGIES",
    "Backbone",
    "Clips",
    "Codec",
    "CodecName",
    "Compute",
    "Evaluate",
    "Expert",
    "FeatureName",
    "Monolith",
    "Partition",
    "Router",
    "RunConfig",
    "RunSection",
    "Sample",
    "Section",
    "SourceName",
    "Strategy",
    "Text",
    "build",
    "check",
    "check_count",
    "known_keys",
    "lookup",
    "merge",
    "parse",
    "parse_sets",
    "read",
    "rope_axes_for",
    "to_toml",
]
