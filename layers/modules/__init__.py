"""Parts that mixers and models call: linear maps, norms, positions, feature maps, short convolution, MLPs."""
