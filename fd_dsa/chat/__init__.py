"""Chat formats: from messages to a prompt, and from answer text to its parts.

This package handles text only, without tokens, engine or HTTP.
"""
