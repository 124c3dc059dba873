"""vLLM plugin: NBL checkpoints (`convert --to transformers`) in vLLM, by name, without remote code.

vLLM calls `plugin.register` in each of its processes (entry point group vllm.general_plugins). The classes are in
`models`, which vLLM imports when it meets such a checkpoint. Nothing here imports the rest of the package.
"""
