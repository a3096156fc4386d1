"""The accuracy harness `longfill eval`: what sparse attention costs and brings on a model. README.md has the design."""
