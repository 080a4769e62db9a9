"""moeprune: make a Mixture-of-Experts LLM small enough to deploy, for a domain, and prove what it kept."""

__version__ = "0.1.0"
