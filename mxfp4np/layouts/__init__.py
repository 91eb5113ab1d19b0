"""Layouts: how each producer names and packs MXFP4, and the rules that find their tensors among the stored ones.

Headers decide. Where several layouts have the same headers, documents of the tool that wrote them decide; without
them, nothing is guessed. These modules look at headers and make views; they read no tensor. See
docs/howto/adding-a-layout.md.
"""
