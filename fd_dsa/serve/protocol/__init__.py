"""Request bodies of the OpenAI API as this server reads them.

Unknown fields are ignored, but for those that would change the result: see `generation`.
"""
