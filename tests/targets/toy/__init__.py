"""A target that rewrites no graph: it saves the linearized torch model, and runs it with torch on the CPU."""
