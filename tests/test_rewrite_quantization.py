"""What quantisers' configurations say after a part of a checkpoint was decoded."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from helpers import write_safetensors_file
