def write(*_): return ""
