"""The runner: persistent batch state, the step hook both engines share, the embedded runner."""
