"""Cost model of a decoder, and its comparison with a machine (roofline)."""
