"""Request bodies of the OpenAI API as this server reads them.

Unknown fields are ignored. Fields that other servers know and that would change the result are
listed in `unsupported` with the values that mean "off"; any other value is refused, never ignored.
"""
