"""The names of torchvision that Mosaic's streaming imports when it starts, for its image data sets.
The wheel on the registry does not fit a CPU build of torch; the tests use none of these.
"""
