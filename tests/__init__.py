"""What is tested beside the method: training, data, pretrained weights, scripts and pages."""
