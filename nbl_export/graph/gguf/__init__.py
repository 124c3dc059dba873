"""NBL models as GGUF files of llama.cpp's architecture `deci`.

    GGUF | safetensors ── read ──► Content (llama) ── linearize ──► Content (deci) ── write ──► file ── check

A layer of a `deci` file with query heads but no key/value heads computes `attn_output.weight` of the normed input,
without a bias, and has no cache (llama.cpp, src/models/deci.cpp).
"""
