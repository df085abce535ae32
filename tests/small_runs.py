"""Recipes of small runs of equations that several tests look at, each from its own side."""

BURGERS = """
problem:
  kind: pde
  equation: burgers
  parameters: {nu: 0.1}
  points: {interior: 40, condition: 10}
  refine: {every: 2, pool: 100}
  resolution: 21
field:
  precision: double
  levels: [{grid: [1, 1], network: {kind: cpikan, hidden: [4], degree: 3}}]
training: {steps: 5, log_every: 1}
solve: {method: levenberg_marquardt, iterations: 2}
"""
INVERSE = """
problem:
  kind: pde
  equation: reaction_diffusion
  unknown: {reaction: 0.3}
  measurements: {points: 20}
  points: {interior: 40}
  resolution: 31
field:
  precision: double
  levels: [{grid: [1], network: {kind: cpikan, hidden: [4], degree: 3}}]
training: {steps: 3, log_every: 1}
"""
