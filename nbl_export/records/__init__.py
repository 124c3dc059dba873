"""The frozen nouns between stages."""
