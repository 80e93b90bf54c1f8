"""Request bodies of the OpenAI API as this server reads them.

`known_fields` lists the fields of other servers.
"""
