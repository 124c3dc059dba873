"""Linear layers in place of attention.

method   what stages call (`methods.base.Method`)
torch    collect ─► maps ─► order, by greedy ─► planning: how many layers a goal allows
ONNX     passes, whose nodes builder makes               reference of verification, which no pass makes
"""
