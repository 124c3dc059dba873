"""One adapter a stage: it declares the inputs of the stage, runs it, and writes what it gives."""
