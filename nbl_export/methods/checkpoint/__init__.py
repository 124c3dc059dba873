"""A checkpoint on disk, with or without maps.

source ─► shape: sizes alone ─► load: torch model and tokenizer        quantized: codes of a second checkpoint
copied writes an NBL checkpoint ─► hf_classes, by which transformers loads the model
"""
