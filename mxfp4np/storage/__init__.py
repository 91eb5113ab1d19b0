"""Files: their headers, zero-copy views of their bytes, their writers, and which files form one checkpoint."""
