"""A small vision transformer on Fashion-MNIST, trained by GPUSQ-ViT's recipe: dense, 2:4 sparse, then 2:4 + INT8."""
