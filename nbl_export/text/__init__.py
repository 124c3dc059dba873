"""Text for calibration and measurement: corpus, mixture, windows, samples."""
