"""Out of Archipel and into it: folders as diffusers writes them, a ``DiffusionPipeline`` over them, and experts from elsewhere."""
