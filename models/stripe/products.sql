-- Stripe: no rows, since the payments export has no products. All revenue is of `Unknown`; see transactions.sql.
--
-- source payments: unified_payments*, payments*, stripe*
-- columns payments: id

SELECT DISTINCT id AS product_id
FROM payments
WHERE 1 = 0
