# SPDX-License-Identifier: Apache-2.0
"""A development CA, for mutual TLS between Gateways and a Core before there is a real PKI."""

from .authority import WARNING, CertificateState, DevelopmentCA, Issued
from .certificates import Role

__all__ = ["WARNING", "CertificateState", "DevelopmentCA", "Issued", "Role"]
