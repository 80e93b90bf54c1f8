"""Graph dispatch of a decorated model (`model_executor/graph_optimization`)."""
