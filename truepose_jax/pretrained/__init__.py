"""Weights of others: conversion from and to PyTorch, the networks that no optimizer touches, region tokens."""
