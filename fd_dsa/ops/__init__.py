"""Operators of the DSA layer; one folder an operator, its `__init__` holds the public function.

Each public function checks its inputs once and calls one provider. On a CPU the provider is
`paddle_impl`: matrix products by Paddle, index work by NumPy on the same memory.
"""
