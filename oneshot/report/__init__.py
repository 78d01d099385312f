from .record import *
from .record import SCHEMA, storable, checked, write, read
