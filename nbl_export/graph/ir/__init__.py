"""An OpenVINO decoder (IR): its files, its states, and the parts of an attention block."""
