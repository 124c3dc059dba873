"""Linear layers in place of attention.

method   what stages call (`methods.base.Method`)
torch    collect ─► maps ─► order, by greedy ─► planning: how many layers a goal allows
ONNX     passes       maps in parts of the original graph judge them (`methods.mixed_session`)
"""
