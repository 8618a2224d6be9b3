"""Flow matching as pure functions: path, time, losses, conversions, samplers, and a closed form to test against."""
