"""What a run will cost before anything is spent: parameters, FLOPs, memory, disk and hours, from ``run.toml`` alone."""
