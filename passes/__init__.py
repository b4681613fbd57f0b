"""Graph passes, one a file. Nothing registers by import; `dlqc.recipe` knows them by file name."""
