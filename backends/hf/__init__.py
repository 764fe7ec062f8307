"""Target ``hf``: a folder of weights and a config that the model's own class loads, generates and trains with."""
