"""Transformations of images, one file each: pure functions whose draws come from the generator that they are given.

`crop`, `flip`, `resize` and `randaugment` take PIL images, `pad_crop` uint8 tensors, `erasing` and `mixing` float
tensors; `pixels` and `scaling` convert.
"""
