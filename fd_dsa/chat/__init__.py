"""Chat formats: from messages to a prompt, and from the text of an answer to its parts.

Knows texts alone: no token, no engine, no HTTP.
"""
