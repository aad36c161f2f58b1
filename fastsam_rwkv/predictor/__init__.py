"""Predictors: from an image and a prompt to masks in the image frame.

`base`, `frame`, `image_io` and `prompts` need numpy and Pillow only; they also serve exported models. `transforms` and
`torch_predictor` need PyTorch.
"""
