"""Tools of others that run models of dlqc. Each needs an extra of its own; nothing is imported before it is asked for."""
