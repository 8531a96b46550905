"""rerail: compress Mixture-of-Experts language models and re-align their routers."""
