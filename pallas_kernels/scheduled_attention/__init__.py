"""Softmax attention whose tiles follow a block schedule: what window, landmark and head-mixture attention have in
common."""
