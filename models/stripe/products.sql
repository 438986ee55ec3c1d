-- Stripe: one row, since the payments export has no products. All payments are of this one; see transactions.sql.
--
-- source payments: unified_payments*, payments*, stripe*
-- columns payments: id

SELECT DISTINCT 'payment' AS product_id, 'Payment' AS product_name, 'Payments' AS category
FROM payments
