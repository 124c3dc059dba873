"""Predicted KV, the whole of it: most tokens of a prompt stop at an exit layer, and maps give their keys and values.

method   what stages call (`methods.base.Method`)
torch    candidates ─► sums ─► maps ─► choose       module, torch_layers as served, teacher_forced at all tokens
ONNX     passes ─► attention, or static of TensorRT      reference of verification; config of a checkpoint
"""
