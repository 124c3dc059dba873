"""Linear layers, or none, in place of attention.

torch    collect ─► maps, none ─► order, by greedy ─► planning: how many layers a goal allows
ONNX     passes, whose nodes builder makes               reference of verification, which no pass makes
"""
