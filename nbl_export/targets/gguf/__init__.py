"""llama.cpp on the CPU, through the npm package node-llama-cpp: runs GGUF files for bench, generate and convert."""
