from arinar.export.mixture import MixtureSample, PlainMixtureSample, draw_mixture
