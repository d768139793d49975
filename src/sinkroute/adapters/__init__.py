"""sinkroute's routers inside the models that people already train; each framework is imported when it is asked for."""
