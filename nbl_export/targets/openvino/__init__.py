"""OpenVINO's CPU plugin as an engine."""
